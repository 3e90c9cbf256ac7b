"""`python -m siamstream`, and `torchrun ... -m siamstream`."""

from siamstream.cli import main

if __name__ == "__main__":
    main()
