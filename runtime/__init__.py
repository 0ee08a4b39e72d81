"""From a prompt to a video with numpy and engines, without PyTorch."""
