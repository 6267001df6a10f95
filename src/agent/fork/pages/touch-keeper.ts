/** Keeps the order in which clones touch an image while it fills, and what earlier clones have touched. */
import type { TouchOrder } from '../../../native/types.js';
import type { ImageRecord } from '../../image/record.js';
import type { ImageStore } from '../../image/store.js';
import { mergeOrders, NO_ORDER } from '../../image/touch-order.js';

/** So much of it is lost if the daemon is killed. */
const KEEP_MS = 5_000;

export class TouchKeeper {
  readonly #orders: ImageStore['orders'];
  readonly #image: ImageRecord;
  /** What the native session has recorded. */
  readonly #read: () => TouchOrder;
  /** What earlier sessions of this image have recorded here. */
  #before: TouchOrder;
  /** What another host has recorded: it comes after what was seen here. */
  #told: TouchOrder = NO_ORDER;
  #keptCount: number;
  #keeping: Promise<void> = Promise.resolve();
  readonly #timer: NodeJS.Timeout;

  constructor(
    { orders }: Pick<ImageStore, 'orders'>,
    image: ImageRecord,
    { before, read }: { readonly before: TouchOrder; readonly read: () => TouchOrder },
  ) {
    this.#orders = orders;
    this.#image = image;
    this.#read = read;
    this.#before = before;
    this.#keptCount = before.length;
    this.#timer = setInterval(() => this.#keep(), KEEP_MS).unref();
  }

  get order(): TouchOrder {
    return mergeOrders(this.#before, this.#read(), this.#told);
  }

  tell(order: TouchOrder): void {
    this.#told = order;
  }

  /** The native session is about to be replaced. */
  carry(): void {
    this.#before = mergeOrders(this.#before, this.#read());
  }

  /** Call it before the native session is closed. `isLost`: the image goes, and its files with it. */
  async close({ isLost }: { readonly isLost: boolean }): Promise<void> {
    clearInterval(this.#timer);
    if (!isLost) this.#keep();
    await this.#keeping;
  }

  #keep(): void {
    const { order } = this;
    if (order.length <= this.#keptCount) return;
    this.#keptCount = order.length;
    this.#keeping = this.#keeping.then(() => this.#orders.write(this.#image, order));
  }
}
