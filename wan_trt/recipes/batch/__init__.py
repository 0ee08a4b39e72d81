"""Many videos from a file of jobs, on one machine, on a Ray cluster or on servers."""
