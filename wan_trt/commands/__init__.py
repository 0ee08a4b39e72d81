"""One file per subcommand; each has one function ``run``, whose parameters are the command's."""
