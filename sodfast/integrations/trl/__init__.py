"""Any teacher schedule, and the fused distillation loss, in TRL's SDPO and SDFT trainers.

    trainer = SDPOTrainer(...)
    use_fused_loss(trainer)
    trainer.add_callback(TeacherScheduleCallback({"kind": "cgtr"}))
    trainer.train()

docs/trl.md is the tutorial. Both are written against the releases of TRL in `known.RELEASES`, whose
experimental trainers may rename things at any release; another one is refused.
"""

from sodfast.integrations.trl.callback import TeacherScheduleCallback
from sodfast.integrations.trl.fused import use_fused_loss

__all__ = ["TeacherScheduleCallback", "use_fused_loss"]
