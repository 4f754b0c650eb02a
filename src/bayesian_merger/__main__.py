"""`python -m bayesian_merger`."""

from bayesian_merger.cli import main

if __name__ == "__main__":
    main()
