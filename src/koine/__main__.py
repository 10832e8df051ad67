"""`python -m koine`, which is also what `torchrun -m koine` starts."""

from koine_lm import main

if __name__ == "__main__":
    main()
