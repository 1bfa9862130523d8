"""A quantized model beside the float model that it was made of, whoever made it."""
