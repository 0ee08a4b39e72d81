"""Export and build at full size: throughput beside ``cp``, peak memory, time to write a graph."""
