from .vocabulary_transfer import Moved as Moved
from .vocabulary_transfer import move_model as move_model
