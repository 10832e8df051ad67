from .attention import attention_of as attention_of
from .attention import attention_of_prompts as attention_of_prompts
from .positions import loss_by_position as loss_by_position
from .scores import score_prompt as score_prompt
from .suite import LongContextOptions as LongContextOptions
from .suite import evaluate_long_context as evaluate_long_context
