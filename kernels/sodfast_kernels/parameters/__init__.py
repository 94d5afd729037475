"""What moves parameters: the teacher's copy and average, and AdamW with compact state.

`BLOCK` and `empty_state` describe AdamW's state to whoever shards or counts it.
"""

from .adamw import AdamW, empty_state
from .formats import BLOCK
from .teacher import ParameterUpdate, copy_teacher_, ema_update_, parameter_distance

__all__ = [
    "BLOCK",
    "AdamW",
    "ParameterUpdate",
    "copy_teacher_",
    "ema_update_",
    "empty_state",
    "parameter_distance",
]
