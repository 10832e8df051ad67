from .loss_spec import LossSpec as LossSpec
