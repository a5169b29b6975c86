"""A Modbus device for the mapper's tests: pymodbus as server, on TCP or on a serial line.

    modbus_server.py tcp PORT     PORT 0 takes a free one
    modbus_server.py serial       makes a line of two pseudo terminals

Prints one line when it serves: the port, or the terminal that a client opens. Ends when its
standard input is closed.

Device 1: holding registers 0 to 99 and input registers 0 to 99 hold ten times their address, holding
40 and 41 hold 4.5 as a float, coil 0 is off and discrete input 0 is on. Other addresses are refused.
Device 2: holding register 0 holds 2222. Other devices do not answer.
"""

import asyncio
import os
import pty
import struct
import sys
import threading
import tty

from pymodbus.datastore import ModbusDeviceContext, ModbusSequentialDataBlock, ModbusServerContext
from pymodbus.framer import FramerType
from pymodbus.server import ModbusSerialServer, ModbusTcpServer


def block(values):
    # The first address of a block is 1 where requests say 0.
    return ModbusSequentialDataBlock(1, values)


def context():
    holding = [10 * address for address in range(100)]
    holding[40:42] = struct.unpack(">HH", struct.pack(">f", 4.5))
    one = ModbusDeviceContext(
        di=block([True]),
        co=block([False]),
        hr=block(holding),
        ir=block([10 * address for address in range(100)]),
    )
    two = ModbusDeviceContext(hr=block([2222]))
    return ModbusServerContext(devices={1: one, 2: two}, single=False)


def line():
    """Joins two pseudo terminals and returns their names."""
    ends = [pty.openpty(), pty.openpty()]
    for _, slave in ends:
        tty.setraw(slave)

    def pump(source, target):
        while True:
            frame = os.read(source, 1024)
            # The server answers for devices that it does not have; on a line nobody would.
            if frame[:1] in (b"\x01", b"\x02"):
                os.write(target, frame)

    for source, target in ((ends[0][0], ends[1][0]), (ends[1][0], ends[0][0])):
        threading.Thread(target=pump, args=(source, target), daemon=True).start()
    return os.ttyname(ends[0][1]), os.ttyname(ends[1][1])


async def main():
    if sys.argv[1] == "tcp":
        server = ModbusTcpServer(context(), address=("127.0.0.1", int(sys.argv[2])))
        await server.serve_forever(background=True)
        where = server.transport.sockets[0].getsockname()[1]
    else:
        own, where = line()
        server = ModbusSerialServer(context(), framer=FramerType.RTU, port=own, baudrate=19200)
        await server.serve_forever(background=True)
    print(where, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


asyncio.run(main())
