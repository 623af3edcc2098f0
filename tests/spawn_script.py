"""A script that is not of this package; its child process says what it knows of it.

Its words: how processes are started; ``import``, if it imports the package itself;
``espnet``, if the child is to look into ESPnet, which takes long to import.
"""

SPAWN = """
import multiprocessing
import sys

def child(connection):
    if "espnet" not in sys.argv:
        connection.send("espnet2_spear" in sys.modules)
        return
    try:
        from espnet2.tasks.abs_task import optim_classes, scheduler_classes
        connection.send("scaledadam" in optim_classes and "eden" in scheduler_classes)
    except Exception as error:
        connection.send(repr(error))

if __name__ == "__main__":
    if "import" in sys.argv:
        import espnet2_spear
    print("espnet2_spear" in sys.modules, "torch" in sys.modules)
    context = multiprocessing.get_context(sys.argv[1])
    parent, other = context.Pipe()
    process = context.Process(target=child, args=(other,))
    process.start()
    other.close()  # the end of a child that sends nothing is noticed
    print(parent.recv())
    process.join()
    sys.exit(process.exitcode)
"""
