"""Articles and contractions of territories' names, by hand."""

from __future__ import annotations

import pytest

from koine.data.sample.subjects import subject_forms


@pytest.mark.parametrize(
    ("code", "territory", "name", "forms"),
    [
        ("en", "JP", "Japan", {"the_x": "Japan"}),
        ("en", "NL", "Netherlands", {"the_x": "the Netherlands"}),
        ("en", "SB", "Solomon Islands", {"the_x": "the Solomon Islands"}),
        ("de", "JP", "Japan", {"of_x": "von Japan", "has_x": "hat Japan"}),
        ("de", "CH", "Schweiz", {"of_x": "der Schweiz", "has_x": "hat die Schweiz"}),
        (
            "de",
            "US",
            "Vereinigte Staaten",
            {"of_x": "der Vereinigten Staaten", "has_x": "haben die Vereinigten Staaten"},
        ),
        ("de", "SB", "Salomoninseln", {"of_x": "der Salomoninseln", "has_x": "haben die Salomoninseln"}),
        ("fr", "FR", "France", {"of_x": "de la France", "in_x": "en France"}),
        ("fr", "JP", "Japon", {"of_x": "du Japon", "in_x": "au Japon"}),
        ("fr", "MX", "Mexique", {"of_x": "du Mexique", "in_x": "au Mexique"}),
        ("fr", "KR", "Corée du Sud", {"of_x": "de la Corée du Sud", "in_x": "en Corée du Sud"}),
        ("fr", "IN", "Inde", {"of_x": "de l'Inde", "in_x": "en Inde"}),
        ("fr", "IR", "Iran", {"of_x": "de l'Iran", "in_x": "en Iran"}),
        ("fr", "US", "États-Unis", {"of_x": "des États-Unis", "in_x": "aux États-Unis"}),
        ("fr", "CU", "Cuba", {"of_x": "de Cuba", "in_x": "à Cuba"}),
        ("fr", "IL", "Israël", {"of_x": "d'Israël", "in_x": "à Israël"}),
        ("fr", "YE", "Yémen", {"of_x": "du Yémen", "in_x": "au Yémen"}),
        ("ja", "JP", "日本", {}),
    ],
)
def test_forms(code: str, territory: str, name: str, forms: dict[str, str]) -> None:
    assert subject_forms(code, territory, name) == forms
