"""`python -m redheart …` is the command line (`accelerate launch -m redheart …` comes through here)."""

from redheart.cli import main

if __name__ == "__main__":
    main()
