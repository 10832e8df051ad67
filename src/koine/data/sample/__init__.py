"""The sample world: facts from CLDR as sentences and questions in many languages, without a download."""

from koine.data.sample.coverage import sample_languages
from koine.data.sample.gold import GoldReward, gold_reward
from koine.data.sample.phrases import QUESTION_LANGUAGES
from koine.data.sample.world import SampleSummary, broad_texts, write_sample

__all__ = [
    "QUESTION_LANGUAGES",
    "GoldReward",
    "SampleSummary",
    "broad_texts",
    "gold_reward",
    "sample_languages",
    "write_sample",
]
