import ray
from ray import serve

ray.init(address="auto")
hello = serve.get_app_handle("default").options(stream=True)
for word in hello.generate.remote("remote feels local"):
    print(word)
