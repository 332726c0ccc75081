// Wallets as others make them, and some that fail. Each signs for real, with an Ed25519 key of its own.

const ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

function base58(bytes) {
  let value = BigInt("0x" + [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(""));
  let text = "";
  for (; value > 0n; value /= 58n) text = ALPHABET[Number(value % 58n)] + text;
  for (const byte of bytes) {
    if (byte) break;
    text = "1" + text;
  }
  return text;
}

const pair = crypto.subtle.generateKey("Ed25519", true, ["sign", "verify"]);
const publicKey = async () => new Uint8Array(await crypto.subtle.exportKey("raw", (await pair).publicKey));
const sign = async (bytes) => new Uint8Array(await crypto.subtle.sign("Ed25519", (await pair).privateKey, bytes));
const account = async () => ({
  address: base58(await publicKey()),
  publicKey: await publicKey(),
  chains: ["solana:mainnet"],
  features: [],
});

/** A wallet of the Wallet Standard with these features, which tells the page of itself. */
function register(name, features) {
  const connect = { version: "1.0.0", connect: async () => ({ accounts: [await account()] }) };
  const wallet = {
    version: "1.0.0",
    name,
    icon: "javascript:alert(1)",
    chains: ["solana:mainnet"],
    accounts: [],
    features: { "standard:connect": connect, ...features },
  };
  const tell = ({ register }) => register(wallet);
  addEventListener("wallet-standard:app-ready", (event) => tell(event.detail));
  dispatchEvent(new CustomEvent("wallet-standard:register-wallet", { detail: tell }));
}

const messages = (signMessage) => ({ "solana:signMessage": { version: "1.1.0", signMessage } });
const signMessage = async ({ message }) => [{ signedMessage: message, signature: await sign(message) }];

const KINDS = {
  // It has no solana:signIn, as Ledger's devices have none.
  "Signs messages": () => register("Signs messages", messages(signMessage)),

  // Its text has a space too many, so the page has to ask it to sign the server's own.
  "Writes its own": () =>
    register("Writes its own", {
      ...messages(signMessage),
      "solana:signIn": {
        version: "1.0.0",
        signIn: async () => {
          const signedMessage = new TextEncoder().encode("own text ");
          return [{ account: await account(), signedMessage, signature: await sign(signedMessage) }];
        },
      },
    }),

  // As Phantom was before the standard.
  Phantom: () => {
    const provider = {
      isPhantom: true,
      publicKey: null,
      async connect() {
        const text = base58(await publicKey());
        this.publicKey = { toString: () => text };
        return { publicKey: this.publicKey };
      },
      async signMessage(message, display) {
        if (display !== "utf8") throw new Error("how shall it be shown?");
        return { signature: await sign(message), publicKey: this.publicKey };
      },
    };
    window.phantom = { solana: provider };
    window.solana = provider;
  },

  Declines: () =>
    register(
      "Declines",
      messages(async () => {
        throw Object.assign(new Error("User rejected the request."), { code: 4001 });
      }),
    ),
  Breaks: () =>
    register(
      "Breaks",
      messages(async () => {
        throw new Error("no device <b>found</b>");
      }),
    ),
  "Signs wrong": () =>
    register(
      "Signs wrong",
      messages(async ({ message }) => [{ signedMessage: message, signature: new Uint8Array(64) }]),
    ),
};

function plugIn(name) {
  KINDS[name]();
}
