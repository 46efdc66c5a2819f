"""Building blocks of models: linear methods, normalisation, rotary embedding, the operator set."""
