from .bits import bits_per_byte as bits_per_byte
from .bootstrap import bootstrap_interval as bootstrap_interval
from .expert_routing import routing_shares as routing_shares
from .question_answering import question_accuracy as question_accuracy
from .records import RecordOptions as RecordOptions
from .runner import evaluate_model as evaluate_model
from .wilson import wilson_interval as wilson_interval
