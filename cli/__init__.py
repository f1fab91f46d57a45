"""The command line: `gflowvlm COMMAND`, one thin module a command."""
