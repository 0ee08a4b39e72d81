"""Steps of several stages, as functions: what a subcommand does that is more than one call."""
