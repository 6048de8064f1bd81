"""Files that full-precision weights come in: safetensors, LeRobot's pipelines, LoRA, the hub."""
