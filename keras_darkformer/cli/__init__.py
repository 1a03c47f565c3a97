"""The command `keras-darkformer`: a module a subcommand, each with what it needs imported late."""
