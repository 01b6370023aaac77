"""Stage 03: LoRA trained through the 2:4 mask and the quantizer, with Axolotl as the trainer.

masks.py and schedule of updates are pure maths, lora.py the layer, callbacks.py what happens at
steps, axolotl_plugin.py the only file that imports axolotl, axolotl_config.py its generated YAML,
trainer.py the stage itself.
"""
