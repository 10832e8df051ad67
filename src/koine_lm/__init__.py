"""Start the `koine` command, unless another project's package `koine` hides ours.

The name `koine` belongs to another project on the package index, so the two can be installed together. This
package has a name of its own: it is found also where `import koine` finds the other package.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit with code 2 and one line where `import koine` finds another project."""
    import koine

    if getattr(koine, "__distribution__", None) != "koine-lm":
        place = getattr(koine, "__file__", None) or list(getattr(koine, "__path__", []))
        print(
            f"koine: {place}: 'import koine' finds another project's package; remove that one and install "
            f"ours again: {sys.executable} -m pip uninstall koine && "
            f"{sys.executable} -m pip install --force-reinstall --no-deps koine-lm",
            file=sys.stderr,
        )
        sys.exit(2)
    from koine.cli.main import main as run

    run()
