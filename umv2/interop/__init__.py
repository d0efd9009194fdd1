"""Import and export of models: our own safetensors, Hugging Face OLMoE, published UltraMem."""
