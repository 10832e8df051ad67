from .special import SPECIAL_TOKENS as SPECIAL_TOKENS
from .streaming import StreamDecoder as StreamDecoder
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer import load_tokenizer as load_tokenizer
from .training import train_tokenizer as train_tokenizer
from .weights import language_weights as language_weights
