"""Models that other programs serve, over the OpenAI-compatible HTTP interface.

    servers     one request: which server, when, how often; what its answer means
    parallel    many requests in flight, results as they arrive
    chat        what a request for answers holds, and how its answer is read
    sampling    `dpo-fast sample --backend openai`

The signals that ask a server are in `signals/served*.py`.
"""
