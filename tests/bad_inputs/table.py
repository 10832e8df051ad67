"""Write the table of bad inputs.

`python -m tests.bad_inputs.table --write` writes docs/reference/bad-inputs.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import (
    cases_adapter,
    cases_command,
    cases_configuration,
    cases_damage,
    cases_endpoint,
    cases_groups,
    cases_import,
    cases_loading,
    cases_merge,
    cases_mixture,
    cases_model,
    cases_monitor,
    cases_online,
    cases_output,
    cases_plan,
    cases_readers,
    cases_reward,
    cases_reward_model,
    cases_text,
    cases_tokenizer,
    cases_training,
    cases_weights,
)
from .case import Case

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "bad-inputs.md"

SECTIONS: dict[str, tuple[Case, ...]] = {
    "The command line and the installation": cases_command.CASES,
    "Text, tokenizers, token shards, mixtures": cases_text.CASES,
    "Data files and odd records": cases_readers.CASES,
    "Preference data and references": cases_groups.CASES,
    "Configurations": cases_configuration.CASES,
    "Tokenizers' files, vocabularies of other libraries": cases_tokenizer.CASES,
    "Models, training, evaluation, chat": cases_model.CASES,
    "Opening models": cases_loading.CASES,
    "Adapters": cases_adapter.CASES,
    "Importing models": cases_import.CASES,
    "Drawing an answer": cases_endpoint.CASES,
    "Merging": cases_merge.CASES,
    "Weight files and what lies beside them": cases_weights.CASES,
    "Mixtures of experts": cases_mixture.CASES,
    "Training and its records": cases_training.CASES,
    "Monitoring preference training": cases_monitor.CASES,
    "Rewards": cases_reward.CASES,
    "Online training and revisions": cases_online.CASES,
    "Reward models": cases_reward_model.CASES,
    "Plans and runs": cases_plan.CASES,
    "Outputs and what the system refuses": cases_output.CASES,
    "Damaged files": cases_damage.CASES,
}

HEAD = """\
# Bad inputs: what the program says

A mistake ends in one line on standard error that names what is wrong, where, and how to fix it; the exit code is 2, and nothing half-written is
left behind. A traceback is a bug of ours. This page is generated from `tests/bad_inputs/`, which runs every line of it: the command is run in a folder
prepared for the case, the line must be exactly this (… stands for text that depends on the machine), and the folder must afterwards be
as it was before (an empty lock file may stay).
"""


def page() -> str:
    """Return the page of the manual."""
    parts = [HEAD]
    for title, cases in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts.append("| the mistake | the command | what it says, after `koine: ` |\n|---|---|---|")
        for case in cases:
            mistake = case.mistake + (f" (in the test: {case.simulated})" if case.simulated else "")
            row = (mistake, f"`koine {case.command}`", case.says)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/reference/bad-inputs.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
