"""The verdict of a validation as HTML, JSON, Markdown and JUnit XML."""
