"""Functions behind subcommands that combine several stages."""
