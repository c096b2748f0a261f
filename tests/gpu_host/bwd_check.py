import ctypes, sys, numpy as np, ml_dtypes
bf16 = ml_dtypes.bfloat16
lib = None
def ref(q,k,v,dout,dlse,vis,scale):
    q,k,v,dout = (x.astype(np.float64) for x in (q,k,v,dout))
    b,hq,sq,d=q.shape; hk=k.shape[1]; g=hq//hk
    kk=np.repeat(k,g,1); vv=np.repeat(v,g,1)
    kk=np.where(np.isnan(kk),0,kk); vv=np.where(np.isnan(vv),0,vv); q=np.where(np.isnan(q),0,q); dout=np.where(np.isnan(dout),0,dout)
    s=np.where(vis, (q@kk.swapaxes(-1,-2))*scale, -np.inf)
    m=s.max(-1,keepdims=True); m=np.where(np.isinf(m),0,m)
    e=np.exp(s-m); l=e.sum(-1,keepdims=True)
    with np.errstate(all='ignore'): p=np.where(l>0,e/l,0); lse=(m+np.log(l))[...,0]
    out=p@vv
    dp=dout@vv.swapaxes(-1,-2)
    delta=(dout*out).sum(-1,keepdims=True)-dlse[...,None]
    ds=p*(dp-delta)*scale
    dq=ds@kk; dk=(ds.swapaxes(-1,-2)@q).reshape(b,hk,g,*k.shape[2:]).sum(2)
    dv=(p.swapaxes(-1,-2)@dout).reshape(b,hk,g,*v.shape[2:]).sum(2)
    return out,lse,dq,dk,dv
def case(lib,b,hq,hk,sq,sk,d,dv,flags=0,left=0,right=0,offset=0,ql=None,kl=None,ks=None,late=0,seed=0,scale=None):
    r=np.random.default_rng(seed)
    A=lambda *s: r.standard_normal(s).astype(np.float32).astype(bf16)
    q,k,v,dout=A(b,hq,sq,d),A(b,hk,sk,d),A(b,hk,sk,dv),A(b,hq,sq,dv)
    dlse=r.standard_normal((b,hq,sq)).astype(np.float32)
    scale = scale or d**-.5
    vis=np.zeros((b,1,sq,sk),bool)
    for n in range(b):
        nq=ql[n] if ql is not None else sq; nk=kl[n] if kl is not None else sk; st=ks[n] if ks is not None else 0
        i=np.arange(sq)[:,None]; j=np.arange(sk)[None]
        ip=i+(offset if flags&4 else nk-nq)
        m=(i<nq)&(j<nk)&(j>=st)
        if flags&1: m&=j>=ip-left
        if flags&2: m&=j<=ip+right
        vis[n,0]=m
    seenk=vis.any((1,2)); seenq=vis.any((1,3))
    for n in range(b):
        k[n][:,~seenk[n]]=np.nan; v[n][:,~seenk[n]]=np.nan; q[n][:,~seenq[n]]=np.nan; dout[n][:,~seenq[n]]=np.nan
    out,lse,dq,dk,dvv=ref(q,k,v,dout,dlse,vis,scale)
    o16=out.astype(np.float32).astype(bf16); l32=lse.astype(np.float32)
    got=[np.full(x.shape,np.nan,np.float32).astype(bf16) for x in (dq,dk,dvv)]
    I=lambda x: None if x is None else np.array(x,np.int32)
    arrs=[q,k,v,o16,l32,dout,dlse,*got,I(ql),I(kl),I(ks)]
    data=(ctypes.c_void_p*13)(*[None if x is None else x.ctypes.data for x in arrs])
    sizes=(ctypes.c_int32*7)(b,hq,hk,sq,sk,d,dv); mask=(ctypes.c_int32*4)(flags,left,right,offset)
    said=ctypes.create_string_buffer(600)
    st=lib.backward_of(sizes,mask,ctypes.c_double(scale),data,late,said)
    assert st==0,(st,said.value)
    res=[]
    for name,g,w in zip(("dq","dk","dv"),got,(dq,dk,dvv)):
        g=g.astype(np.float64)
        err=np.abs(g-w).max() if np.isfinite(g).all() else np.nan
        res.append(f"{name} {err/ max(np.abs(w).max(),1e-9):.2e}{'' if np.isfinite(g).all() else ' NaN at '+str(np.argwhere(~np.isfinite(g))[:2].tolist())}")
    print(dict(b=b,hq=hq,hk=hk,sq=sq,sk=sk,d=d,dv=dv,flags=flags,left=left,right=right,offset=offset,ql=ql,kl=kl,ks=ks,late=late),*res,flush=True)
