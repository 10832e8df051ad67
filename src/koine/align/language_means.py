"""Weighted means of figures, overall and by language."""

from __future__ import annotations


class LanguageMeans:
    """Adds up values of figures; the means are over all languages, and of each."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, list[float]]] = {}

    def add(self, name: str, language: str, value: float, weight: float = 1.0) -> None:
        """Add a value of a figure, which counts `weight` times."""
        entry = self._sums.setdefault(name, {}).setdefault(language, [0.0, 0.0])
        entry[0] += value * weight
        entry[1] += weight

    def overall(self) -> dict[str, float]:
        """Return the mean of each figure over all values, in the order in which they were first added."""
        return {
            name: sum(total for total, _ in by_language.values())
            / sum(weight for _, weight in by_language.values())
            for name, by_language in self._sums.items()
        }

    def languages(self) -> dict[str, dict[str, float]]:
        """Return the means of each language, in the order of the codes."""
        codes = sorted({code for by_language in self._sums.values() for code in by_language})
        return {
            code: {
                name: by_language[code][0] / by_language[code][1]
                for name, by_language in self._sums.items()
                if code in by_language
            }
            for code in codes
        }
