"""What moves parameters: the teacher's copy and average, and AdamW with compact state.

`BLOCK` and `empty_state` describe AdamW's state to who shards or counts it; `Item`, `coefficients`,
`update_chunk` and `update_flat` are the steps of the PyTorch path, to who measures its memory.
"""

from .adamw import AdamW, coefficients, empty_state, update_chunk
from .adamw_item import Item
from .formats import BLOCK
from .teacher import (
    ParameterUpdate,
    copy_teacher_,
    ema_update_,
    parameter_distance,
    update_flat,
)

__all__ = [
    "BLOCK",
    "AdamW",
    "Item",
    "ParameterUpdate",
    "coefficients",
    "copy_teacher_",
    "ema_update_",
    "empty_state",
    "parameter_distance",
    "update_chunk",
    "update_flat",
]
