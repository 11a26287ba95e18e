"""LoRAs by the names that ComfyUI and sd-scripts have for a model's modules."""
