"""Models in other formats: our own safetensors, Hugging Face OLMoE, published UltraMem."""
