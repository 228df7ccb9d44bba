"""A saved model behind HTTP, in OpenAI's shapes, with a page to look at it (extra ``serve``)."""
