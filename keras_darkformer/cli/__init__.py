"""The command `keras-darkformer`: one module per subcommand, each with late imports."""
