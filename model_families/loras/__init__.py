"""Files of LoRAs and their kin: recognised, fused, attached, made smaller."""
