"""The HTTP gateway: ``/v1/videos``, a durable queue of jobs, and workers that send them to Triton servers.

A request is checked as the served model would check it, written to the database, then scheduled, then answered.
"""
