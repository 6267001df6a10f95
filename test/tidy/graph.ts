/** Returns each circle of a graph once, as a set of names: its strongly connected components (Tarjan 1972). */
export function circlesOf(graph: ReadonlyMap<string, readonly string[]>): string[][] {
  const order = new Map<string, number>();
  const lowest = new Map<string, number>();
  const path: string[] = [];
  const circles: string[][] = [];
  const visit = (name: string): number => {
    const number = order.size;
    order.set(name, number);
    let low = number;
    path.push(name);
    for (const next of graph.get(name) ?? []) {
      if (!order.has(next)) low = Math.min(low, visit(next));
      else if (path.includes(next)) low = Math.min(low, lowest.get(next) ?? order.get(next) ?? low);
    }
    lowest.set(name, low);
    if (low === number) {
      const circle = path.splice(path.indexOf(name));
      if (circle.length > 1) circles.push(circle.sort());
    }
    return low;
  };
  for (const name of graph.keys()) if (!order.has(name)) visit(name);
  return circles;
}

export function graphOfRooms(files: ReadonlyMap<string, readonly string[]>, room: (path: string) => string) {
  const rooms = new Map<string, string[]>();
  for (const [file, targets] of files) {
    const from = room(file);
    const others = targets.map(room).filter((target) => target !== from);
    rooms.set(from, [...(rooms.get(from) ?? []), ...others]);
  }
  return rooms;
}
