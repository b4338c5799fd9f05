"""A server for programs that use Stable Diffusion over HTTP, in the protocols they know, with a page of its own.

    settings.py    every setting of the server, with its default and range
    catalogue.py   the files that requests may name: models, LoRAs, embeddings, control networks, VAEs
    jobs.py        what a client asks for, and how far it is
    engine.py      the queue of jobs; worker.py: a device and its models, which work on them
    events.py      progress as Server-Sent Events
    app.py         the application: the routes of all protocols, and what protects them

    a1111/         the HTTP interface of AUTOMATIC1111's web UI
    openai/        OpenAI's images interface
    native/        ours: requests of the library as JSON, and their progress as events
    inside/        what happens inside the model, for the page
    page/          the page: HTML, CSS and JavaScript modules, served as they are

FastAPI, uvicorn and the like are the extra `server`.
"""
