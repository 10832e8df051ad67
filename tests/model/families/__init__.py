"""Every family of decoders against `transformers`; a family is covered by its entries in `cases`."""
