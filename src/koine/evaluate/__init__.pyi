from .bits import bits_per_byte as bits_per_byte
from .bootstrap import bootstrap_interval as bootstrap_interval
from .question_answering import question_accuracy as question_accuracy
from .runner import evaluate_model as evaluate_model
