"""The sample world: facts from CLDR as sentences and questions in many languages, without a download."""

from koine.data.sample.coverage import sample_languages
from koine.data.sample.phrases import QUESTION_LANGUAGES
from koine.data.sample.world import SampleSummary, broad_texts, write_sample

__all__ = ["QUESTION_LANGUAGES", "SampleSummary", "broad_texts", "sample_languages", "write_sample"]
