"""`python -m koine`, which is also what `torchrun -m koine` starts."""

from koine.cli.main import main

if __name__ == "__main__":
    main()
