"""Living models: a folder that is a base model, a method, a policy, and the ledger of every edit made since."""

from everedit.living.config import LivingConfig
from everedit.living.model import LivingModel
from everedit.living.outcome import Added, SetAside

__all__ = ["Added", "LivingConfig", "LivingModel", "SetAside"]
