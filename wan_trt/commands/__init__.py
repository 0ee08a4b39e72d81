"""One file per subcommand, with a function ``run`` whose parameters are the command's."""
