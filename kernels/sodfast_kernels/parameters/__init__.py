"""What moves parameters: the teacher's copy and average, and AdamW with compact state."""

from . import adamw, teacher
from .adamw import AdamW, empty_state, places
from .formats import BLOCK
from .teacher import ParameterUpdate, copy_teacher_, ema_update_, parameter_distance

__all__ = [
    "BLOCK",
    "AdamW",
    "ParameterUpdate",
    "adamw",
    "copy_teacher_",
    "ema_update_",
    "empty_state",
    "parameter_distance",
    "places",
    "teacher",
]
