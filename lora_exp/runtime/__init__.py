"""What knows neither models nor data: the console, the cache, files and locks of run directories, the device mesh.

Nothing here imports another package of lora_exp than `config`.
"""
