"""`python -m gflowvlm COMMAND`: the command line."""

from gflowvlm.cli.main import main

if __name__ == "__main__":
    main()
