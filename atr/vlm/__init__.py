"""Vision-language models: loading, reduction of their inputs, generation, distillation and measurements."""
